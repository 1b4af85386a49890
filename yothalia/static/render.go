package main
import ("encoding/json"; "os"; "text/template")
func main() {
  var in struct { Template string; System string; Messages []struct{ Role, Content string } }
  if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
  if err := template.Must(template.New("").Parse(in.Template)).Execute(os.Stdout, in); err != nil { panic(err) }
}
