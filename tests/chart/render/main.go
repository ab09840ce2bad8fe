// render writes what Helm makes of a chart, where there is no Helm: the same engine (Go's text/template and sprig), the
// same objects and functions around it, the same way of merging values. Of tests alone.
//
//	render CHART [-f VALUES]... [-name RELEASE] [-namespace NAMESPACE] [-numbers]
//
// It prints {"values": merged, "files": {path: text}}, or "error" in the place of "files". Not here, for this chart has
// none: subcharts, library charts, a cluster to look things up in (Helm without one finds nothing either), toToml.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"sigs.k8s.io/yaml"
)

type table = map[string]interface{}

// numbers: whether numbers stay as they are written, as in some versions of Helm; in the others they are float64.
var numbers = flag.Bool("numbers", false, "keep numbers as they are written")

func main() {
	var given []string
	flag.Func("f", "file of values; later ones count before earlier ones", func(path string) error {
		given = append(given, path)
		return nil
	})
	name := flag.String("name", "queryselect", "of the release")
	namespace := flag.String("namespace", "default", "of the release")
	chart := os.Args[1]
	flag.CommandLine.Parse(os.Args[2:])

	values := table{}
	for _, path := range given {
		values = override(values, read(path))
	}
	values = coalesce(values, read(filepath.Join(chart, "values.yaml")))
	answer := table{"values": values}
	files, err := render(chart, table{
		"Values": values,
		"Chart":  metadata(read(filepath.Join(chart, "Chart.yaml"))),
		"Release": table{
			"Name": *name, "Namespace": *namespace, "Service": "Helm",
			"Revision": 1, "IsInstall": true, "IsUpgrade": false,
		},
		"Capabilities": table{
			"KubeVersion": table{"Version": "v1.30.0", "Major": "1", "Minor": "30"}, "APIVersions": apiVersions{},
		},
	})
	if err != nil {
		answer["error"] = err.Error()
	} else {
		answer["files"] = files
	}
	if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
		panic(err)
	}
}

// read gives what a YAML file says.
func read(path string) table {
	data, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	found := table{}
	if err := yaml.Unmarshal(data, &found, func(decoder *json.Decoder) *json.Decoder {
		if *numbers {
			decoder.UseNumber()
		}
		return decoder
	}); err != nil {
		panic(fmt.Errorf("%s: %w", path, err))
	}
	return found
}

// override lays one file of values over another; null stays, for the chart's own values.
func override(under, over table) table {
	merged := table{}
	for key, value := range under {
		merged[key] = value
	}
	for key, value := range over {
		inner, isTable := value.(table)
		before, wasTable := merged[key].(table)
		if isTable && wasTable {
			value = override(before, inner)
		}
		merged[key] = value
	}
	return merged
}

// coalesce lays values over the chart's own: what is null there is in neither.
func coalesce(values, defaults table) table {
	for key, standard := range defaults {
		value, given := values[key]
		inner, isTable := value.(table)
		beneath, wasTable := standard.(table)
		switch {
		case !given:
			values[key] = standard
		case value == nil:
			delete(values, key)
		case isTable && wasTable:
			coalesce(inner, beneath)
		}
	}
	return values
}

// metadata gives Chart.yaml as templates see it: .Chart.AppVersion for appVersion.
func metadata(read table) table {
	seen := table{}
	for key, value := range read {
		seen[strings.ToUpper(key[:1])+key[1:]] = value
	}
	return seen
}

type apiVersions struct{}

func (apiVersions) Has(version string) bool { return version == "v1" || version == "apps/v1" }

// render executes the templates but for those that begin with an underscore, which are there to be included.
func render(chart string, context table) (map[string]string, error) {
	templates, own := map[string]string{}, files{}
	err := filepath.Walk(chart, func(file string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		data, err := os.ReadFile(file)
		relative, _ := filepath.Rel(chart, file)
		switch {
		case strings.HasPrefix(relative, "templates/"):
			templates[relative] = string(data)
		case relative != "Chart.yaml" && relative != "values.yaml" && relative != "values.schema.json":
			own[relative] = data
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	context["Files"] = own
	root := template.New("gotpl").Option("missingkey=zero")
	root.Funcs(functions(root))
	var names []string
	for name, text := range templates {
		if _, err := root.New(name).Parse(text); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	sort.Strings(names)
	rendered := map[string]string{}
	for _, name := range names {
		if strings.HasPrefix(path.Base(name), "_") {
			continue
		}
		context["Template"] = table{"Name": "queryselect/" + name, "BasePath": "queryselect/templates"}
		if rendered[name], err = execute(root, name, context); err != nil {
			return nil, err
		}
	}
	return rendered, nil
}

// execute gives what one template makes of its data. Go writes <no value> for what is missing; Helm takes it out.
func execute(root *template.Template, name string, data interface{}) (string, error) {
	var text strings.Builder
	err := root.ExecuteTemplate(&text, name, data)
	return strings.ReplaceAll(text.String(), "<no value>", ""), err
}

// functions are sprig's, without those that Helm takes out, and Helm's own.
func functions(root *template.Template) template.FuncMap {
	found := sprig.TxtFuncMap()
	delete(found, "env")
	delete(found, "expandenv")
	own := template.FuncMap{
		"include": func(name string, data interface{}) (string, error) { return execute(root, name, data) },
		"tpl": func(text string, data interface{}) (string, error) {
			copied, err := root.Clone()
			if err != nil {
				return "", err
			}
			if _, err := copied.New("tpl").Parse(text); err != nil {
				return "", err
			}
			return execute(copied, "tpl", data)
		},
		"required": func(message string, value interface{}) (interface{}, error) {
			if value == nil || value == "" {
				return nil, errors.New(message)
			}
			return value, nil
		},
		"lookup": func(_, _, _, _ string) table { return table{} },
		"toYaml": func(value interface{}) string { return strings.TrimSuffix(marshal(yaml.Marshal, value), "\n") },
		"toJson": func(value interface{}) string { return marshal(json.Marshal, value) },
		"fromYaml": func(text string) (found table, err error) {
			err = yaml.Unmarshal([]byte(text), &found)
			return
		},
		"fromJson": func(text string) (found table, err error) {
			err = json.Unmarshal([]byte(text), &found)
			return
		},
	}
	for name, function := range own {
		found[name] = function
	}
	return found
}

func marshal(how func(interface{}) ([]byte, error), value interface{}) string {
	data, err := how(value)
	if err != nil {
		panic(err) // Helm would write nothing, which no test would see
	}
	return string(data)
}

// files are those of the chart that are neither templates nor values.
type files map[string][]byte

func (own files) Get(name string) string {
	data, found := own[name]
	if !found {
		panic(name + " is not there") // Helm would write nothing, which no test would see
	}
	return string(data)
}

func (own files) Glob(pattern string) files {
	found := files{}
	for name, data := range own {
		if matches, _ := path.Match(pattern, name); matches {
			found[name] = data
		}
	}
	return found
}

func (own files) AsConfig() string {
	found := map[string]string{}
	for name, data := range own {
		found[path.Base(name)] = string(data)
	}
	return strings.TrimSuffix(marshal(yaml.Marshal, found), "\n")
}
